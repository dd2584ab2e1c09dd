"""Files and processes: whole or absent, checked before they are believed."""
