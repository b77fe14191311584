"""What a result depends on: code, libraries, machine; and whether it still is what was written."""
