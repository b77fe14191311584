"""The kernel study: how far pruning moves the kernel that governs training."""
