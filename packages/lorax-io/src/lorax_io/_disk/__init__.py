"""Reading and writing files: untrusted input is checked, and output is atomic."""
