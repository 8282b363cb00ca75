"""The measured numbers on the pages, written from the files that hold them."""
