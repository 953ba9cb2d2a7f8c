"""Tucker-2: its tensor algebra, the dense layers that can be replaced, and the modules in Tucker-2 form."""
