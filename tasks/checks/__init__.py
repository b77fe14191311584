"""What can be known of model and text before anything is computed."""
