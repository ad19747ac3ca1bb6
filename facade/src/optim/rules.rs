//! The hyperparameters of Fabric's optimizers, with torch's names and defaults. The formulas are
//! [`Rule`]'s. A group's options are of these types.

use fabric_engine::{
    Result,
    kernels::{self, Rule},
};

use super::{ByElement, Elements, Elementwise, elementwise::states};

/// A type of hyperparameters, a kernel's behind a name of its own, and one builder method for each of them: on the type
/// itself, for groups, and on the optimizer, for everything.
macro_rules! rule {
    (
        $(#[$doc:meta])+
        $name:ident of $numbers:ident {
            $($(#[$set_doc:meta])+ $set:ident($($field:ident: $kind:ty),+);)+
        }
    ) => {
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name(kernels::$numbers);

        impl $name {
            $($(#[$set_doc])+
            pub fn $set(mut self, $($field: $kind),+) -> Self {
                $(self.0.$field = $field;)+
                self
            })+
        }

        impl ByElement<$name> {
            $($(#[$set_doc])+
            pub fn $set(self, $($field: $kind),+) -> Self {
                self.with(|rule| rule.$set($($field),+))
            })+
        }

        impl From<$name> for Rule {
            fn from(rule: $name) -> Self {
                Self::$name(rule.0)
            }
        }

        impl Elementwise for $name {
            fn name(&self) -> &str {
                Rule::from(*self).name()
            }
            fn states(&self) -> &[&'static str] {
                states(&Rule::from(*self))
            }
            fn learning_rate(&self) -> f64 {
                self.0.lr
            }
            fn set_learning_rate(&mut self, lr: f64) {
                self.0.lr = lr;
            }
            fn check(&self) -> Result<()> {
                Rule::from(*self).check()
            }
            fn update(&self, elements: Elements<'_, '_>) -> Result<()> {
                Rule::from(*self).update(elements)
            }
        }
    };
}

rule! {
    /// Hyperparameters of [`Sgd`](super::Sgd).
    Sgd of Sgd {
        /// With this learning rate.
        lr(lr: f64);
        /// With momentum: how much of the mean survives a step. 0, the default, is none.
        momentum(momentum: f64);
        /// With this much of the gradient kept out of the momentum.
        dampening(dampening: f64);
        /// With Nesterov's momentum, which needs a momentum, and no dampening.
        nesterov(nesterov: bool);
        /// With weight decay, added to the gradient.
        weight_decay(weight_decay: f64);
        /// Ascending instead of descending.
        maximize(maximize: bool);
    }
}

rule! {
    /// Hyperparameters of [`Adam`](super::Adam).
    Adam of Adam {
        /// With this learning rate.
        lr(lr: f64);
        /// With other betas: the decay of the mean gradient, and of the mean square.
        betas(beta1: f64, beta2: f64);
        /// With another epsilon.
        eps(eps: f64);
        /// With weight decay, added to the gradient.
        weight_decay(weight_decay: f64);
    }
}

rule! {
    /// Hyperparameters of [`AdamW`](super::AdamW).
    AdamW of Adam {
        /// With this learning rate.
        lr(lr: f64);
        /// With other betas: the decay of the mean gradient, and of the mean square.
        betas(beta1: f64, beta2: f64);
        /// With another epsilon.
        eps(eps: f64);
        /// With another weight decay: a parameter shrinks by `lr * weight_decay` of itself.
        weight_decay(weight_decay: f64);
    }
}

rule! {
    /// Hyperparameters of [`Lion`](super::Lion).
    Lion of Lion {
        /// With this learning rate: how far every element moves.
        lr(lr: f64);
        /// With other betas: the decay of the mean whose sign is taken, and of the mean that is kept.
        betas(beta1: f64, beta2: f64);
        /// With weight decay: a parameter shrinks by `lr * weight_decay` of itself.
        weight_decay(weight_decay: f64);
    }
}

impl ByElement<Sgd> {
    /// Plain SGD.
    pub fn new(lr: f64) -> Self {
        Self::of(Sgd(kernels::Sgd {
            lr,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
            maximize: false,
        }))
    }
}

impl ByElement<Adam> {
    /// Adam with torch's defaults: betas 0.9 and 0.999, eps 1e-8, no weight decay.
    pub fn new(lr: f64) -> Self {
        Self::of(Adam(adam(lr, 0.0)))
    }
}

impl ByElement<AdamW> {
    /// AdamW with torch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    pub fn new(lr: f64) -> Self {
        Self::of(AdamW(adam(lr, 0.01)))
    }
}

impl ByElement<Lion> {
    /// Lion with its authors' defaults: betas 0.9 and 0.99, no weight decay.
    pub fn new(lr: f64) -> Self {
        Self::of(Lion(kernels::Lion {
            lr,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.0,
        }))
    }
}

fn adam(lr: f64, weight_decay: f64) -> kernels::Adam {
    kernels::Adam {
        lr,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay,
    }
}
