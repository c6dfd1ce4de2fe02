"""Triton kernels. They import nothing else of ours: shapes and dtypes were checked by whoever calls them."""

__all__: list[str] = []
