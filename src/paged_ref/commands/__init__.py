"""The commands of `paged-ref`, one file each."""
