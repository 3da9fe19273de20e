"""Files -> rows -> conversations -> examples of token ids."""
