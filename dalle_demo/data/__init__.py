"""folders and packages of pictures -> image-caption pairs."""
