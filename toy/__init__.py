import full  # noqa: F401
