"""Zero-shot: how much accuracy each method loses."""
