# Written by meson when the package is built.
VERSION: str
BUILD_HASH: str
ABI_VERSION: int
