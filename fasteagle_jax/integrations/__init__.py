"""Other programs' frameworks; each module needs an extra of its own."""
