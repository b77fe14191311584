"""What the recover step does when it is asked to."""
