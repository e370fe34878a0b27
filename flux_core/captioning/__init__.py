"""Captions for folders of pictures: by vision-language models, or by the sprites of flux-mini's world."""
