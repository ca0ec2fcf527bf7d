//! What arrives in a callback of the device, to be awaited; natively with a thread that polls the device meanwhile.
//!
//! Callbacks run in polls. A browser polls by itself; natively an awaited call would never end if nobody did. So callbacks
//! that are to come are counted, and while there are any a thread polls, one for each `Gpu`. It starts with the first,
//! lingers a moment behind the last one, and ends; at the latest with its `Gpu`, which waits for it: a driver that a process
//! leaves while another thread gives its device back can crash. A call that is dropped half-way leaves its callback to it. A
//! blocking call polls on its own thread and needs none.

use futures_channel::oneshot;

use super::open::Gpu;

/// What a callback brings.
#[derive(Debug)]
pub(super) struct Arrival {
    arrived: oneshot::Receiver<bool>,
}

/// Brings it.
#[derive(Debug)]
pub(super) struct Sender {
    sender: oneshot::Sender<bool>,
    #[cfg(feature = "threads")]
    _expected: Option<Expected>,
}

/// The callback's end and the awaiting one. Without a `Gpu` it is the caller who polls the device.
pub(super) fn arrival(polled_by: Option<&Gpu>) -> (Sender, Arrival) {
    let (sender, arrived) = oneshot::channel();
    #[cfg(not(feature = "threads"))]
    let _ = polled_by;
    let sender = Sender {
        sender,
        #[cfg(feature = "threads")]
        _expected: polled_by.and_then(|gpu| gpu.poller().expect(gpu.device())),
    };
    (sender, Arrival { arrived })
}

impl Sender {
    /// Nobody may be waiting any longer: a call can be dropped half-way.
    pub(super) fn arrive(self, value: bool) {
        let _ = self.sender.send(value);
    }
}

impl Arrival {
    /// What was brought; `false` where the callback was dropped, as with a device that is gone.
    pub(super) async fn wait(self) -> bool {
        self.arrived.await.unwrap_or(false)
    }
}

#[cfg(feature = "threads")]
pub(super) use native::{Expected, Poller, polling_here};

#[cfg(feature = "threads")]
mod native {
    use std::cell::Cell;
    use std::sync::{Arc, Condvar, Mutex, PoisonError};
    use std::thread::JoinHandle;
    use std::time::Duration;

    use super::super::error::lock;

    /// How long the thread waits for the next call before it ends.
    const LINGER: Duration = Duration::from_millis(20);
    /// Between polls that find nothing.
    const SOON: Duration = Duration::from_micros(50);

    thread_local! {
        static POLLS_ITSELF: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `work` on a thread that polls the device itself.
    pub(in crate::gpu) fn polling_here<T>(work: impl FnOnce() -> T) -> T {
        struct Restore(bool);
        impl Drop for Restore {
            fn drop(&mut self) {
                POLLS_ITSELF.set(self.0);
            }
        }
        let _restore = Restore(POLLS_ITSELF.replace(true));
        work()
    }

    /// The thread of a `Gpu`, where one runs.
    #[derive(Debug, Default)]
    pub(in crate::gpu) struct Poller {
        shared: Arc<Shared>,
    }

    #[derive(Debug, Default)]
    struct Shared {
        state: Mutex<State>,
        changed: Condvar,
    }

    #[derive(Debug, Default)]
    struct State {
        expected: usize,
        runs: bool,
        /// The `Gpu` is dropped.
        ends: bool,
        /// Of the last thread that was started, which may have ended.
        thread: Option<JoinHandle<()>>,
    }

    /// A callback that is to come; dropped with it.
    #[derive(Debug)]
    pub(in crate::gpu) struct Expected(Arc<Shared>);

    impl Drop for Expected {
        fn drop(&mut self) {
            lock(&self.0.state).expected -= 1;
        }
    }

    impl Poller {
        /// Sees to it that the device is polled until the result is dropped; none where this thread polls anyway.
        pub(in crate::gpu) fn expect(&self, device: &wgpu::Device) -> Option<Expected> {
            if POLLS_ITSELF.get() {
                return None;
            }
            let mut state = lock(&self.shared.state);
            if !state.runs {
                // it has said that it ends, and has nothing left to do
                wait_for(state.thread.take());
                let (device, shared) = (device.clone(), Arc::clone(&self.shared));
                let thread = std::thread::Builder::new().name("cross-attention poll".to_owned());
                // without a thread the call still ends where the caller polls, and no thread is no reason to fail there
                state.thread = thread.spawn(move || shared.poll_while_expected(&device)).ok();
                state.runs = state.thread.is_some();
            }
            state.expected += 1;
            self.shared.changed.notify_one();
            Some(Expected(Arc::clone(&self.shared)))
        }
    }

    impl Drop for Poller {
        fn drop(&mut self) {
            let mut state = lock(&self.shared.state);
            state.ends = true;
            let thread = state.thread.take();
            drop(state);
            self.shared.changed.notify_one();
            wait_for(thread);
        }
    }

    /// A callback on that thread may be what drops the `Gpu`: it does not wait for itself.
    fn wait_for(thread: Option<JoinHandle<()>>) {
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }

    impl Shared {
        fn poll_while_expected(&self, device: &wgpu::Device) {
            let mut state = lock(&self.state);
            loop {
                // what is still expected then, nobody waits for
                if state.ends {
                    return;
                }
                if state.expected > 0 {
                    drop(state);
                    // callbacks run here, or in the poll of another thread; those of a lost device run as well
                    if device.poll(wgpu::PollType::wait_indefinitely()).is_err() {
                        std::thread::yield_now();
                    }
                    state = lock(&self.state);
                    if state.expected > 0 {
                        // what is expected is not submitted yet
                        (state, _) = self.changed.wait_timeout(state, SOON).unwrap_or_else(PoisonError::into_inner);
                    }
                    continue;
                }
                let (next, waited) = self.changed.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
                state = next;
                if waited.timed_out() && state.expected == 0 {
                    state.runs = false;
                    return;
                }
            }
        }
    }
}
