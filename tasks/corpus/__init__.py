"""Text that is brought: which files hold it, their rows and documents, how it is written."""
