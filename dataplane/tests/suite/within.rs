//! Channels of tests that differ from another channel in a thing or two.

/// What such a channel leaves to the one within it, its field of that name: all but `poll`, and what has a default; with `@most`
/// also all but `submit` and `capabilities`.
macro_rules! as_within {
    ($within:tt) => {
        crate::within::as_within!(@most $within);
        fn capabilities(&self) -> holdfast_transport::Capabilities {
            self.$within.capabilities()
        }
        fn submit(
            &mut self,
            token: u64,
            operation: holdfast_transport::Operation,
        ) -> Result<(), holdfast_transport::Rejected> {
            self.$within.submit(token, operation)
        }
    };
    (@most $within:tt) => {
        fn identity(&self) -> &holdfast_shared::auth::ChannelIdentity {
            self.$within.identity()
        }
        fn peer(&self) -> std::net::SocketAddr {
            self.$within.peer()
        }
        fn arm(&mut self) -> holdfast_transport::Armed {
            self.$within.arm()
        }
        fn wake_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.$within.wake_fd()
        }
        fn close(&mut self) {
            self.$within.close();
        }
        fn ended(&self) -> Option<holdfast_transport::ChannelError> {
            self.$within.ended()
        }
        fn registrar(&self) -> std::sync::Arc<dyn holdfast_transport::Registrar> {
            self.$within.registrar()
        }
    };
}
pub(crate) use as_within;
