//! One suite for every transport: what is shown here, their users may rely on.
//!
//! Over verbs it runs where there is an RDMA device that `HOLDFAST_RXE_ADDR` (10.9.0.1 if unset) leads to; otherwise that is
//! said in a line, and with `HOLDFAST_REQUIRE_RDMA=1` it is a failure.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
)]

mod descriptors;
mod fabrics;
mod hostile;
mod kit;
mod life;
mod listening;
mod messages;
mod model;
mod pinned;
mod processes;
mod refusals;
mod shared;
mod transfers;
mod views;
mod waking;

macro_rules! suite {
    ($($module:ident::$tests:tt;)*) => {
        mod memory { $(suite!(@tests Memory $module $tests);)* }
        mod tcp { $(suite!(@tests Tcp $module $tests);)* suite!(@listening Tcp); }
        mod local { $(suite!(@tests Local $module $tests);)* suite!(@listening Local); }
        mod verbs { $(suite!(@tests Verbs $module $tests);)* suite!(@listening Verbs); }
    };
    (@listening $fabric:ident) => {
        suite!(@tests $fabric listening {
            a_stopper_ends_a_waiting_accept_for_ever,
            who_is_turned_away_costs_nothing_and_the_next_is_served,
            one_listener_serves_many_and_outlives_them,
            nobody_there_is_an_error_soon,
            setups_that_contradict_themselves_are_refused,
        });
        suite!(@tests $fabric processes { a_killed_process_is_noticed_and_leaves_nothing_behind });
        #[test]
        #[ignore = "a part of another test, in a process of its own"]
        fn the_other_process() {
            crate::processes::other_process::<crate::fabrics::$fabric>();
        }
    };
    (@tests $fabric:ident $module:ident { $($test:ident),* $(,)? }) => {
        $(
            #[test]
            fn $test() {
                if <crate::fabrics::$fabric as crate::kit::Fabric>::is_available() {
                    crate::$module::$test::<crate::fabrics::$fabric>();
                }
            }
        )*
    };
}

suite! {
    messages::{
        messages_arrive_in_order_and_whole,
        both_directions_at_full_depth,
        a_send_waits_for_a_recv,
        a_message_longer_than_its_buffer_ends_the_channel,
    };
    transfers::{
        what_was_placed_is_there_when_the_next_message_is,
        fetches_bring_what_is_there,
        nothing_is_moved_where_nothing_is_asked,
        more_fetches_than_the_wire_takes_at_once,
        more_large_fetches_than_the_wire_takes_at_once,
        only_what_was_named_is_touched,
    };
    refusals::{
        a_full_queue_gives_the_operation_back,
        invalid_operations_are_given_back,
        an_unknown_key_is_refused,
        memory_outside_a_region_is_refused,
        access_that_was_not_given_is_refused,
        withdrawn_memory_is_refused,
        memory_withdrawn_under_many_fetches_ends_them_all,
        other_channels_keep_their_memory_to_themselves,
    };
    life::{
        closing_returns_every_buffer_once,
        closing_in_the_middle_of_transfers_returns_every_buffer_once,
        a_peer_that_goes_wakes_the_sleeper,
        a_peer_that_goes_wakes_even_who_has_nothing_posted,
        dropped_channels_return_their_buffers,
        eight_channels_at_once,
    };
    waking::{
        what_is_pushed_goes_out_and_the_answer_still_wakes,
        two_sleepers_never_miss_each_other,
        bursts_between_sleepers_are_never_lost,
        sleepers_that_move_bulk_both_ways_never_miss_each_other,
        who_waits_for_room_hears_of_it_whoever_looked_in_between,
    };
    model::{
        random_operations_agree_with_the_model,
    };
}
