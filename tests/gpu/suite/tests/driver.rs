//! The stand-in for libcuda, as cudarc sees it: right programs are right, wrong ones go wrong as they do on a device.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError, result, sys};
use gpu_suite::{
    fakes,
    stage::{finish, with_fakes},
};

const NUMEL: usize = 10_000;

fn code<T>(result: Result<T, DriverError>) -> i32 {
    result.map_or_else(|error| error.0 as i32, |_| 0)
}

/// One stream fills a buffer twice, another copies it. True: the copy has the last values.
fn relay(first: &Arc<CudaStream>, second: &Arc<CudaStream>, with_event: bool) -> bool {
    let values = vec![7u32; NUMEL];
    let (mut from, mut into) = (
        first.alloc_zeros::<u32>(NUMEL).unwrap(),
        second.alloc_zeros::<u32>(NUMEL).unwrap(),
    );
    first.synchronize().unwrap();
    second.synchronize().unwrap();
    first.memcpy_htod(&values, &mut from).unwrap();
    if with_event {
        second.wait(&first.record_event(None).unwrap()).unwrap();
    }
    second.memcpy_dtod(&from, &mut into).unwrap();
    let seen = second.clone_dtoh(&into).unwrap();
    first.synchronize().unwrap();
    seen == values
}

#[test]
fn two_streams_are_right_with_an_event_and_wrong_without() {
    with_fakes(&[], || {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: every wait between streams in this test is by hand, or left out on purpose.
        unsafe { context.disable_event_tracking() };
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let right = |with_event| {
            (0..40)
                .filter(|_| relay(&first, &second, with_event))
                .count()
        };
        assert_eq!(right(true), 40);
        let lucky = right(false);
        assert!(lucky < 40, "a missing wait never showed");
    });
}

#[test]
fn the_legacy_stream_waits_for_others_and_they_for_it() {
    with_fakes(&[], || {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: as above.
        unsafe { context.disable_event_tracking() };
        let (legacy, mut handle) = (context.default_stream(), std::ptr::null_mut());
        // SAFETY: a place for a handle; flag 0 is a stream that blocks.
        unsafe { sys::cuStreamCreate(&mut handle, 0) }
            .result()
            .unwrap();
        for turn in 0..20u8 {
            let mut from = legacy.alloc_zeros::<u8>(NUMEL).unwrap();
            legacy.memset_zeros(&mut from).unwrap();
            let pointer = pointer(&from);
            // SAFETY: the buffer has that many bytes, and lives until the copy below is over.
            unsafe { result::memset_d8_async(pointer, turn, NUMEL, handle) }.unwrap();
            assert_eq!(legacy.clone_dtoh(&from).unwrap(), vec![turn; NUMEL]);
        }
    });
}

fn pointer<T>(slice: &CudaSlice<T>) -> u64 {
    use cudarc::driver::DevicePtr;
    slice.device_ptr(slice.stream()).0
}

#[test]
fn memory_is_counted_limited_poisoned_and_freed_once() {
    with_fakes(&[("FAKE_CUDA_MEMORY", "100000")], || {
        let context = CudaContext::new(1).unwrap();
        let stream = context.new_stream().unwrap();
        assert_eq!(context.mem_get_info().unwrap(), (100_000, 100_000));
        let slice = stream.clone_htod(&vec![1u8; 60_000]).unwrap();
        assert_eq!((fakes::live(0), fakes::live(1)), (0, 1));
        assert_eq!(context.mem_get_info().unwrap(), (40_000, 100_000));
        assert_eq!(code(stream.alloc_zeros::<u8>(60_000)), 2);
        drop(slice); // freed in the stream's order, so what comes after it in this stream may have it
        // SAFETY: it is copied as it is.
        let fresh = unsafe { stream.alloc::<u8>(60_000) }.unwrap();
        assert!(
            stream
                .clone_dtoh(&fresh)
                .unwrap()
                .iter()
                .all(|byte| *byte == 0xa5)
        );
        let pointer = pointer(&fresh);
        drop(fresh);
        // SAFETY: the driver is to refuse it.
        let again = unsafe { result::free_async(pointer, stream.cu_stream()) };
        assert_eq!(code(again), 1);
        stream.synchronize().unwrap();
        assert_eq!(fakes::live(1), 0);
        // SAFETY: as above.
        assert_eq!(code(unsafe { result::free_sync(pointer) }), 1);
    });
}

#[test]
fn a_stray_pointer_breaks_the_context_for_good() {
    with_fakes(&[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let slice = stream.clone_htod(&[1u8; 64]).unwrap();
        let other = CudaContext::new(1).unwrap();
        let elsewhere = other.new_stream().unwrap();
        context.bind_to_thread().unwrap();
        // SAFETY: the driver is to refuse it: it is longer than the allocation.
        unsafe { result::memset_d8_async(pointer(&slice), 0, 65, stream.cu_stream()) }.unwrap();
        assert_eq!(code(stream.synchronize()), 700);
        assert_eq!(code(stream.clone_htod(&[1u8; 4])), 700);
        assert_eq!(code(context.synchronize()), 700);
        assert_eq!(
            elsewhere
                .clone_dtoh(&elsewhere.clone_htod(&[3u8]).unwrap())
                .unwrap(),
            [3]
        );
        std::mem::forget(slice); // its free would fail too
    });
}

#[test]
fn handles_that_are_over_or_anothers_are_refused() {
    with_fakes(&[], || {
        let contexts = [CudaContext::new(0).unwrap(), CudaContext::new(1).unwrap()];
        contexts[0].bind_to_thread().unwrap();
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for a handle.
        unsafe { sys::cuStreamCreate(&mut stream, 1) }
            .result()
            .unwrap();
        contexts[1].bind_to_thread().unwrap();
        // SAFETY: the driver is to refuse it: the stream is device 0's.
        assert_eq!(code(unsafe { result::malloc_async(stream, 4) }), 400);
        contexts[0].bind_to_thread().unwrap();
        // SAFETY: nobody else has the handle.
        unsafe { result::stream::destroy(stream) }.unwrap();
        // SAFETY: the driver is to refuse it: the stream is over.
        assert_eq!(code(unsafe { result::stream::synchronize(stream) }), 400);
        assert_eq!(code(CudaContext::new(2)), 101);
        let image = c".visible .entry mine(".as_ptr().cast();
        // SAFETY: the image is a text that ends.
        let module = unsafe { result::module::load_data(image) }.unwrap();
        // SAFETY: the module was just loaded.
        let function = unsafe { result::module::get_function(module, c"nobodys".into()) };
        assert_eq!(code(function), 500);
    });
}

#[test]
fn a_machine_without_devices_says_so() {
    with_fakes(&[("FAKE_CUDA_DEVICES", "0")], || {
        assert_eq!(code(CudaContext::new(0)), 100);
        assert_eq!(code(CudaContext::device_count()), 100);
    });
}

#[test]
fn calls_fail_when_told_to_and_say_it_in_the_drivers_words() {
    with_fakes(
        &[(
            "FAKE_CUDA_FAIL",
            "cuMemcpyHtoDAsync:2:719,cuStreamCreate:1:2",
        )],
        || {
            let context = CudaContext::new(0).unwrap();
            assert_eq!(code(context.new_stream()), 2);
            let stream = context.new_stream().unwrap();
            let slice = stream.clone_htod(&[1u8; 4]).unwrap();
            let error = stream.clone_htod(&[1u8; 4]).unwrap_err();
            let words = (error.error_name().unwrap(), error.error_string().unwrap());
            assert_eq!(
                words,
                (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure")
            );
            assert_eq!(code(stream.synchronize()), 719);
            assert_eq!(fakes::calls("cuMemcpyHtoDAsync_v2"), 2);
            std::mem::forget(slice);
        },
    );
}

#[test]
fn events_are_reached_in_their_streams_order_and_tell_time() {
    with_fakes(&[("FAKE_CUDA_DELAY_US", "2000")], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = stream.record_event(flags).unwrap();
        let _slices: Vec<_> = (0..20)
            .map(|_| stream.alloc_zeros::<u8>(16).unwrap())
            .collect();
        let end = stream.record_event(flags).unwrap();
        end.synchronize().unwrap();
        assert!(end.is_complete() && start.elapsed_ms(&end).unwrap() > 0.0);
        let blind = stream.record_event(None).unwrap();
        blind.synchronize().unwrap();
        assert_eq!(code(start.elapsed_ms(&blind)), 400);
    });
}

/// Goal: a test that fails on the stage fails outside. Method: one that always does, left out unless asked for.
#[test]
fn failures_come_through_with_their_output() {
    let executable = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new(executable);
    command
        .args(["always_fails", "--exact", "--include-ignored"])
        .env_remove("FABRIC_STAGE");
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let (is_right, output) = finish(command.spawn().unwrap(), std::time::Duration::from_secs(60));
    assert!(
        !is_right && output.contains("the reason for it"),
        "{output}"
    );
}

#[test]
#[ignore = "fails on purpose, for the test above"]
fn always_fails() {
    with_fakes(&[], || panic!("the reason for it"));
}

/// `Move` in `kernels/cuda/abi.cuh`.
fn table(from: u64, into: u64, numel: u64) -> Vec<u8> {
    [from, into, numel, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

fn load(name: &std::ffi::CStr) -> sys::CUfunction {
    let text = format!(".visible .entry {}(\n", name.to_str().unwrap());
    let text = std::ffi::CString::new(text).unwrap();
    // SAFETY: the image is a text that ends.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap();
    // SAFETY: the module was just loaded.
    unsafe { result::module::get_function(module, name.into()) }.unwrap()
}

fn launch(function: sys::CUfunction, stream: &CudaStream, table: u64, mut scale: f64) -> i32 {
    let (mut table, mut count, mut chunks) = (table, 1u32, 1u64);
    let mut arguments = [
        (&raw mut table).cast(),
        (&raw mut count).cast(),
        (&raw mut chunks).cast(),
        (&raw mut scale).cast(),
    ];
    // SAFETY: the arguments of a move, which are copied before this returns.
    code(unsafe {
        result::launch_kernel(
            function,
            (3, 1, 1),
            (256, 1, 1),
            0,
            stream.cu_stream(),
            &mut arguments,
        )
    })
}

#[test]
fn kernels_run_in_stream_order_on_the_memory_that_their_tables_name() {
    with_fakes(&[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let function = load(c"move_f32_f64");
        let numel = 5000;
        let values: Vec<f32> = (0..numel).map(|i| i as f32).collect();
        let from = stream.clone_htod(&values).unwrap();
        let into = stream.alloc_zeros::<f64>(numel).unwrap();
        let own = table(pointer(&from), pointer(&into), numel as u64);
        let entries = stream.clone_htod(&own).unwrap();
        assert_eq!(launch(function, &stream, pointer(&entries), 0.5), 0);
        let right: Vec<f64> = values.iter().map(|value| f64::from(*value) / 2.0).collect();
        assert_eq!(stream.clone_dtoh(&into).unwrap(), right);
        assert_eq!(fakes::calls("cuLaunchKernel"), 1);
    });
}

#[test]
fn a_kernel_whose_table_leads_astray_breaks_the_context() {
    with_fakes(&[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let function = load(c"move_f32_f32");
        let slice = stream.clone_htod(&[0f32; 64]).unwrap();
        let own = table(pointer(&slice), pointer(&slice), 65);
        let entries = stream.clone_htod(&own).unwrap();
        assert_eq!(launch(function, &stream, pointer(&entries), 1.0), 0);
        assert_eq!(code(stream.synchronize()), 700);
        assert_eq!(launch(function, &stream, pointer(&entries), 1.0), 700);
        std::mem::forget((slice, entries)); // their frees would fail too
    });
}

#[test]
fn a_kernel_does_not_touch_another_device_unless_it_may() {
    with_fakes(&[], || {
        let contexts = [CudaContext::new(0).unwrap(), CudaContext::new(1).unwrap()];
        let streams = contexts
            .each_ref()
            .map(|context| context.new_stream().unwrap());
        let there = streams[1].clone_htod(&[3f32; 8]).unwrap();
        streams[1].synchronize().unwrap();
        contexts[0].bind_to_thread().unwrap();
        // SAFETY: both contexts are alive.
        let enabled = unsafe { sys::cuCtxEnablePeerAccess(contexts[1].cu_ctx(), 0) };
        assert_eq!(enabled as i32, 0);
        let function = load(c"move_f32_f32");
        let here = streams[0].alloc_zeros::<f32>(8).unwrap();
        let entries = streams[0]
            .clone_htod(&table(pointer(&there), pointer(&here), 8))
            .unwrap();
        contexts[0].bind_to_thread().unwrap();
        assert_eq!(launch(function, &streams[0], pointer(&entries), 2.0), 0);
        assert_eq!(streams[0].clone_dtoh(&here).unwrap(), [6.0; 8]);
        // SAFETY: as above.
        let disabled = unsafe { sys::cuCtxDisablePeerAccess(contexts[1].cu_ctx()) };
        assert_eq!(disabled as i32, 0);
        assert_eq!(launch(function, &streams[0], pointer(&entries), 2.0), 0);
        assert_eq!(code(streams[0].synchronize()), 700);
        std::mem::forget((here, entries));
    });
}
