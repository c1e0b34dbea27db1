"""What people start: the command line, the page in the browser, the demo."""
