"""A model that other programs speak to over HTTP: a queue with one worker, and OpenAI's endpoints for pictures."""
