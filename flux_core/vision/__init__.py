"""What is seen in a picture, by networks of transformers."""
