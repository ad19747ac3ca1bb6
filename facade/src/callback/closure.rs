//! Callbacks from closures: [`at`] a moment that Lightning has a name for, or [`on`] one of the program's own.

use std::any::{Any, type_name};

use super::{Callback, Hook, Moment};
use crate::{Error, Fabric, Result};

/// How a closure's callback is copied for another rank.
type Twin<C> = fn(&C) -> Box<dyn Callback>;

/// A callback from a closure, for one of Lightning's moments.
///
/// ```
/// use fabric::{Fabric, callback::{Hook, LoopState, at}};
///
/// let builder = Fabric::builder().callback(at(Hook::ValidationEnd, |fabric, moment| {
///     let val_loss = moment.metrics.require("val_loss", "the example")?;
///     fabric.log("val_loss", val_loss, moment.progress.steps)
/// }));
/// builder.build()?.launch(|fabric| {
///     let mut state = LoopState::default();
///     assert!(fabric.notify(Hook::ValidationEnd, &mut state.moment()).is_err());
///     state.metrics.set("val_loss", 0.5);
///     fabric.notify(Hook::ValidationEnd, &mut state.moment())
/// })?;
/// # Ok::<(), fabric::Error>(())
/// ```
pub fn at<F>(hook: Hook, body: F) -> At<F>
where
    F: FnMut(&Fabric, &mut Moment<'_>) -> Result<()> + Send + 'static,
{
    let twin = None;
    At { hook, body, twin }
}

/// A closure that listens to one of Lightning's moments, made by [`at`].
pub struct At<F> {
    hook: Hook,
    body: F,
    twin: Option<Twin<Self>>,
}

impl<F> At<F>
where
    F: FnMut(&Fabric, &mut Moment<'_>) -> Result<()> + Clone + Send + 'static,
{
    /// The same, of which every rank of [`Fabric::launch_threads`] has a copy: it may run collectives.
    pub fn per_rank(mut self) -> Self {
        self.twin = Some(|own| Box::new(at(own.hook, own.body.clone()).per_rank()));
        self
    }
}

impl<F> Callback for At<F>
where
    F: FnMut(&Fabric, &mut Moment<'_>) -> Result<()> + Send + 'static,
{
    fn notify(&mut self, hook: Hook, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        match hook == self.hook {
            true => (self.body)(fabric, moment),
            false => Ok(()),
        }
    }
    fn twin(&self) -> Option<Box<dyn Callback>> {
        self.twin.map(|twin| twin(self))
    }
}

/// A callback from a closure, for a moment that the program has named itself, and whose payload is a `P`.
///
/// ```
/// use fabric::{Fabric, callback::on};
///
/// struct Report { loss: f64 }
///
/// let fabric = Fabric::builder().callback(on("on_report", |_, report: &mut Report| {
///     if report.loss.is_nan() {
///         fabric::bail!("the loss is not a number");
///     }
///     Ok(())
/// }));
/// let fabric = fabric.build()?;
/// fabric.call("on_report", &mut Report { loss: 0.5 })?;
///
/// let error = fabric.call("on_report", &mut "text").unwrap_err().to_string();
/// assert!(error.contains("Report") && error.contains("&str"));
/// # Ok::<(), fabric::Error>(())
/// ```
pub fn on<P: Any, F>(hook: impl Into<String>, body: F) -> On<P, F>
where
    F: FnMut(&Fabric, &mut P) -> Result<()> + Send + 'static,
{
    On {
        hook: hook.into(),
        body,
        twin: None,
        payload: std::marker::PhantomData,
    }
}

/// A closure that listens to one moment of the program's own, made by [`on`].
pub struct On<P, F> {
    hook: String,
    body: F,
    twin: Option<Twin<Self>>,
    payload: std::marker::PhantomData<fn(&mut P)>,
}

impl<P: Any, F> On<P, F>
where
    F: FnMut(&Fabric, &mut P) -> Result<()> + Clone + Send + 'static,
{
    /// The same, of which every rank of [`Fabric::launch_threads`] has a copy: it may run collectives.
    pub fn per_rank(mut self) -> Self {
        self.twin = Some(|own| Box::new(on(own.hook.clone(), own.body.clone()).per_rank()));
        self
    }
}

impl<P: Any, F> Callback for On<P, F>
where
    F: FnMut(&Fabric, &mut P) -> Result<()> + Send + 'static,
{
    fn call(&mut self, fabric: &Fabric, hook: &str, payload: &mut dyn Any) -> Result<()> {
        if hook != self.hook {
            return Ok(());
        }
        match payload.downcast_mut() {
            Some(payload) => (self.body)(fabric, payload),
            None => Err(Error::from(Mismatch {
                hook: self.hook.clone(),
                expected: type_name::<P>(),
                given: "another type",
            })),
        }
    }
    fn twin(&self) -> Option<Box<dyn Callback>> {
        self.twin.map(|twin| twin(self))
    }
}

/// A hook was called with a payload of another type than its listener expects. The listener knows what it expects, and
/// only the caller knows the name of what was given.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "a callback on {hook:?} expects a payload of type {expected}, but was called with {given}. Call the hook with \
     that type, or change the closure's argument"
)]
struct Mismatch {
    hook: String,
    expected: &'static str,
    given: &'static str,
}

/// The same error, with the name of what was given.
pub(super) fn naming<P>(error: Error) -> Error {
    match error.downcast_ref::<Mismatch>() {
        Some(mismatch) => Mismatch {
            given: type_name::<P>(),
            ..mismatch.clone()
        }
        .into(),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fabric(callbacks: Vec<Box<dyn Callback>>) -> Fabric {
        let builder = Fabric::builder().devices(1).callbacks(callbacks);
        builder.build().unwrap()
    }

    // API-46, line 56
    #[test]
    fn line_56_callbacks_run_in_the_order_of_registration() {
        let names = ["first", "second", "third"];
        let callback = |name: &'static str| -> Box<dyn Callback> {
            Box::new(on("end", move |_, seen: &mut Vec<&str>| {
                seen.push(name);
                Ok(())
            }))
        };
        let fabric = fabric(names.map(callback).into());
        let mut seen: Vec<&str> = Vec::new();
        fabric.call("end", &mut seen).unwrap();
        assert_eq!(seen, names);
        fabric.call("start", &mut seen).unwrap();
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn the_first_error_stops_the_rest() {
        let fabric = fabric(vec![
            Box::new(on("end", |_, _: &mut u32| Err(Error::new("enough")))),
            Box::new(on("end", |_, count: &mut u32| {
                *count += 1;
                Ok(())
            })),
        ]);
        let mut count = 0u32;
        let error = fabric.call("end", &mut count).unwrap_err();
        assert_eq!((error.to_string().as_str(), count), ("enough", 0));
    }

    #[test]
    fn a_payload_of_another_type_is_named_with_the_expected_one() {
        let fabric = fabric(vec![Box::new(on("end", |_, _: &mut u32| Ok(())))]);
        let text = fabric.call("end", &mut 1.5f64).unwrap_err().to_string();
        for word in ["\"end\"", "u32", "f64"] {
            assert!(text.contains(word), "{text}");
        }
        fabric.call("start", &mut 1.5f64).unwrap(); // another hook may have another payload
    }

    #[test]
    fn a_callback_may_call_and_is_not_told_of_its_own_calls() {
        let nested = |fabric: &Fabric, depth: &mut u32| {
            *depth += 1;
            fabric.call("end", depth) // reaches the second callback, and comes back
        };
        let fabric = fabric(vec![
            Box::new(on("end", nested)),
            Box::new(on("end", |_, depth: &mut u32| {
                *depth += 10;
                Ok(())
            })),
        ]);
        let mut depth = 0u32;
        fabric.call("end", &mut depth).unwrap();
        assert_eq!(depth, 21, "once from within the first, once after it");
    }
}
