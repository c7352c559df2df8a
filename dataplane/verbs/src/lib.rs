//! Safe wrapper round libibverbs and librdmacm, and the one memory module: all unsafe code of Holdfast.
