"""Situations in which comparable tools draw wrong pictures without a word, kind by kind."""
