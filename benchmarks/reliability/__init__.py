"""What becomes of a pipeline that is killed or damaged: `kills`, `damage`."""
