"""pageferry: live migration of virtual machines under nested paging, with proof that nothing was lost."""

__version__ = "0.1.0"
