"""What is seen in a picture: maps of edges and depth, words for Redux; and the networks of transformers for that."""
