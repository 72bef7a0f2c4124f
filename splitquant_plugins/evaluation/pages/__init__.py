"""Pages of HTML that need nothing else: no script, no font, no file from anywhere."""
