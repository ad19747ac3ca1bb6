//! Callbacks: what a program hangs on the named moments of its loop. Fabric calls them in the order of registration.

use std::any::{Any, type_name};

use crate::{Error, Result};

/// Something that listens to moments of the training loop. A moment is a name and a payload, which a callback may
/// change; it ignores names that it does not know.
///
/// ```
/// use std::any::Any;
/// use fabric::callback::{Callback, Callbacks};
///
/// struct Count(u64);
/// impl Callback for Count {
///     fn call(&mut self, hook: &str, payload: &mut dyn Any) -> fabric::Result<()> {
///         if let ("on_train_batch_end", Some(total)) = (hook, payload.downcast_mut::<u64>()) {
///             self.0 += 1;
///             *total = self.0;
///         }
///         Ok(())
///     }
/// }
///
/// let mut callbacks = Callbacks::new();
/// callbacks.add(Count(0));
/// let mut batches = 0u64;
/// callbacks.call("on_train_batch_end", &mut batches)?;
/// callbacks.call("on_train_batch_end", &mut batches)?;
/// assert_eq!(batches, 2);
/// # Ok::<(), fabric::Error>(())
/// ```
pub trait Callback: Send {
    /// The moment `hook` has come.
    ///
    /// # Errors
    /// Whatever should end the loop.
    fn call(&mut self, hook: &str, payload: &mut dyn Any) -> Result<()>;
}

impl<C: Callback + ?Sized> Callback for Box<C> {
    fn call(&mut self, hook: &str, payload: &mut dyn Any) -> Result<()> {
        (**self).call(hook, payload)
    }
}

/// Callbacks in the order of their registration.
#[derive(Default)]
pub struct Callbacks(Vec<Box<dyn Callback>>);

impl Callbacks {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Register one more.
    pub fn add(&mut self, callback: impl Callback + 'static) {
        self.0.push(Box::new(callback));
    }

    /// How many are registered.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is registered.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Call all with the moment `hook`; each sees what those before it made of `payload`.
    ///
    /// # Errors
    /// The first callback's error; those after it are not called.
    pub fn call<P: Any>(&mut self, hook: &str, payload: &mut P) -> Result<()> {
        self.0.iter_mut().try_for_each(|callback| {
            callback
                .call(hook, payload)
                .map_err(|error| match error.downcast_ref::<Mismatch>() {
                    Some(mismatch) => mismatch.with_given(type_name::<P>()).into(),
                    None => error,
                })
        })
    }
}

/// A callback from a closure: it listens to one `hook`, whose payload is a `P`.
///
/// ```
/// use fabric::callback::{Callbacks, on};
///
/// struct Metrics { loss: f64 }
///
/// let mut callbacks = Callbacks::new();
/// callbacks.add(on("on_train_epoch_end", |metrics: &mut Metrics| {
///     if metrics.loss.is_nan() {
///         fabric::bail!("the loss is not a number");
///     }
///     Ok(())
/// }));
/// callbacks.call("on_train_epoch_end", &mut Metrics { loss: 0.5 })?;
///
/// let error = callbacks.call("on_train_epoch_end", &mut "text").unwrap_err().to_string();
/// assert!(error.contains("Metrics") && error.contains("&str"));
/// # Ok::<(), fabric::Error>(())
/// ```
pub fn on<P: Any, F>(hook: impl Into<String>, body: F) -> On<P, F>
where
    F: FnMut(&mut P) -> Result<()> + Send,
{
    On {
        hook: hook.into(),
        body,
        payload: std::marker::PhantomData,
    }
}

/// A closure that listens to one hook, made by [`on`].
pub struct On<P, F> {
    hook: String,
    body: F,
    payload: std::marker::PhantomData<fn(&mut P)>,
}

impl<P: Any, F: FnMut(&mut P) -> Result<()> + Send> Callback for On<P, F> {
    fn call(&mut self, hook: &str, payload: &mut dyn Any) -> Result<()> {
        if hook != self.hook {
            return Ok(());
        }
        match payload.downcast_mut() {
            Some(payload) => (self.body)(payload),
            None => Err(Error::from(Mismatch {
                hook: self.hook.clone(),
                expected: type_name::<P>(),
                given: "another type",
            })),
        }
    }
}

/// A hook was called with a payload of another type than its listener expects. The listener knows what it expects, and
/// only [`Callbacks::call`] knows the name of what was given.
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

impl Mismatch {
    fn with_given(&self, given: &'static str) -> Self {
        Self {
            given,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callbacks_run_in_the_order_of_registration() {
        let mut callbacks = Callbacks::new();
        for name in ["first", "second", "third"] {
            callbacks.add(on("end", move |seen: &mut Vec<&str>| {
                seen.push(name);
                Ok(())
            }));
        }
        let mut seen: Vec<&str> = Vec::new();
        callbacks.call("end", &mut seen).unwrap();
        assert_eq!(seen, ["first", "second", "third"]);
        callbacks.call("start", &mut seen).unwrap();
        assert_eq!((seen.len(), callbacks.len()), (3, 3));
    }

    #[test]
    fn the_first_error_stops_the_rest() {
        let mut callbacks = Callbacks::new();
        callbacks.add(on("end", |_: &mut u32| Err(Error::new("enough"))));
        callbacks.add(on("end", |count: &mut u32| {
            *count += 1;
            Ok(())
        }));
        let mut count = 0u32;
        let error = callbacks.call("end", &mut count).unwrap_err();
        assert_eq!((error.to_string().as_str(), count), ("enough", 0));
    }

    #[test]
    fn a_payload_of_another_type_is_named_with_the_expected_one() {
        let mut callbacks = Callbacks::new();
        callbacks.add(on("end", |_: &mut u32| Ok(())));
        let text = callbacks.call("end", &mut 1.5f64).unwrap_err().to_string();
        for word in ["\"end\"", "u32", "f64"] {
            assert!(text.contains(word), "{text}");
        }
        callbacks.call("start", &mut 1.5f64).unwrap(); // another hook may have another payload
    }
}
