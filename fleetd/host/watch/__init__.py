"""Watch files and folders for changes."""
