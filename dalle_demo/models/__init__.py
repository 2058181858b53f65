"""tensors -> tensors: the networks, as plain torch.nn modules that open no file and choose no device."""
