"""What the text tools share: reading records, encoding them on several cores, progress."""
