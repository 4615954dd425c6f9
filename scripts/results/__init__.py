"""What `fathom bench` writes of its measurements: JSON, a table, pictures."""
