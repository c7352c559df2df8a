//! All orders.
