"""What is kept on disk and on the Hub: whole writes, model cards, checkpoints, prompts and pictures."""
