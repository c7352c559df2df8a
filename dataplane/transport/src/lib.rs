//! One small trait over verbs, tcp and memory: Send, Recv, Place, Fetch on registered memory.
