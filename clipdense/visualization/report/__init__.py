"""Report of one or two runs as a single HTML file."""
