"""The screens of `paged-ref viz`, one file each."""
