"""engine -> web page: the only package that uses gradio, and one that never touches tensors."""
