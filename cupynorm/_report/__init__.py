"""What would run, what is there, and whether it is right."""
