"""What a comparison says: rows and a verdict, as text, as JSON and as a page."""
