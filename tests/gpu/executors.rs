//! Awaited calls end by themselves, whoever awaits them, and leave nothing behind where they are dropped.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use cross_attention::gpu::Gpu;
use cross_attention::{AttentionData, AttentionOutput, AttentionProblem, Device};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::interop::same_adapter;
use super::trials::trial;
use crate::common::case::Case;

/// Far beyond what a call takes: a call that never ends fails, and does not hang the run.
const PATIENCE: Duration = Duration::from_secs(120);

type Check = fn(&Call) -> Result<(), String>;

const CHECKS: [(&str, Check); 6] = [
    ("pollster", by_pollster),
    ("threads", by_threads),
    ("tokio_of_one_thread", by_tokio_of_one_thread),
    ("tokio_of_threads", by_tokio_of_threads),
    ("dropped", dropped_half_way),
    ("gone_with_its_thread", gone_with_its_thread),
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    CHECKS
        .into_iter()
        .map(|(name, check)| {
            let context = adapter.context.clone();
            trial(adapter, "awaited", name, move || check(&Call::new(&context)?))
        })
        .collect()
}

/// One call, and what it gives where a blocking call polls the device.
#[derive(Clone)]
struct Call {
    device: Device,
    problem: AttentionProblem,
    data: AttentionData,
    wanted: AttentionOutput,
}

impl Call {
    fn new(context: &Gpu) -> Result<Self, String> {
        let device = Device::Gpu(context.clone());
        let case = Case::new("awaited", "calls that end by themselves", 1, [2, 2], [3, 40], [8, 8]);
        let problem = case.problem();
        let data = case.recipe.data("awaited", &case.spec, &problem);
        let wanted = device.attention_blocking(&problem, &data.as_inputs()).map_err(|error| error.to_string())?;
        Ok(Self { device, problem, data, wanted })
    }

    async fn run(&self) -> Result<(), String> {
        let result = self.device.attention(&self.problem, &self.data.as_inputs()).await;
        if result.map_err(|error| error.to_string())? == self.wanted { Ok(()) } else { Err("other bits".to_owned()) }
    }
}

/// What a thread gives, if it gives anything in time.
fn in_time(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Result<(), String> {
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    result.recv_timeout(PATIENCE).map_err(|_| "the call never ends".to_owned())?
}

fn by_pollster(call: &Call) -> Result<(), String> {
    let call = call.clone();
    in_time(move || pollster::block_on(async { call.run().await.and(call.run().await) }))
}

fn by_threads(call: &Call) -> Result<(), String> {
    let call = call.clone();
    in_time(move || {
        std::thread::scope(|scope| {
            let run = || pollster::block_on(call.run());
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
        })
    })
}

fn by_tokio_of_one_thread(call: &Call) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    on_tokio(&runtime.map_err(|error| error.to_string())?, call)
}

fn by_tokio_of_threads(call: &Call) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
    on_tokio(&runtime.map_err(|error| error.to_string())?, call)
}

/// Three tasks at once, and then another after a pause in which nothing polls.
fn on_tokio(runtime: &tokio::runtime::Runtime, call: &Call) -> Result<(), String> {
    let at_once = async {
        let tasks = [(); 3].map(|()| {
            let call = call.clone();
            tokio::spawn(async move { call.run().await })
        });
        for task in tasks {
            task.await.map_err(|error| error.to_string())??;
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        call.run().await
    };
    runtime.block_on(async { tokio::time::timeout(PATIENCE, at_once).await }).map_err(|error| error.to_string())?
}

/// A call is dropped at every place where it waits; what it left behind is no matter to the next one.
fn dropped_half_way(call: &Call) -> Result<(), String> {
    for waits in 0..4 {
        let mut run = pin!(call.run());
        let mut task = TaskContext::from_waker(Waker::noop());
        for _ in 0..=waits {
            if let Poll::Ready(result) = run.as_mut().poll(&mut task) {
                result?;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    by_pollster(call)
}

/// What polls a device for a `Gpu` is gone with it: a process that ends while another thread gives a device back can crash
/// in its driver.
fn gone_with_its_thread(call: &Call) -> Result<(), String> {
    let Device::Gpu(gpu) = &call.device else { return Err("no GPU".to_owned()) };
    let adapter = same_adapter(&gpu.info().name)?;
    for pause in [0, 1, 30] {
        let (device, queue) =
            pollster::block_on(adapter.request_device(&Default::default())).map_err(|error| error.to_string())?;
        let held = Arc::new(());
        let by_device = Arc::clone(&held);
        device.set_device_lost_callback(move |_, _| {
            let _held = &by_device;
        });
        let gpu = pollster::block_on(Gpu::from_device(device, queue)).map_err(|error| error.to_string())?;
        let device = Device::Gpu(gpu);
        let result = pollster::block_on(device.attention(&call.problem, &call.data.as_inputs()));
        result.map_err(|error| error.to_string())?;
        std::thread::sleep(Duration::from_millis(pause));
        drop(device);
        if Arc::strong_count(&held) > 1 {
            return Err(format!("{pause} ms after its last call the device outlives its Gpu"));
        }
    }
    Ok(())
}
