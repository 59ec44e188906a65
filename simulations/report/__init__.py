"""What a grid says: numbers, then tables in CSV and Markdown, plots, and one HTML page that holds them all."""
