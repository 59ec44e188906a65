"""What one client does: with its key and images, without Flower (`local`) and inside Flower (`client_app`)."""
