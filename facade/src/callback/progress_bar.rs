//! A callback that draws how far training is.

use indicatif::{ProgressBar as Bar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::{Callback, Moment};
use crate::{Fabric, Result};

const WITH_END: &str = "{prefix} {wide_bar:.cyan/dim} {pos}/{len} [{elapsed}<{eta}, {rate}] {msg}";
const WITHOUT_END: &str = "{prefix} {spinner} {pos} [{elapsed}, {rate}] {msg}";

/// Batches a second, in as many digits as are worth reading.
fn rate(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    let rate = state.per_sec();
    let digits = if rate < 10.0 { 2 } else { 0 };
    let _ = write!(out, "{rate:.digits$}/s"); // a line that cannot be drawn is none
}

/// Draws a bar for each epoch on rank 0's stderr, with the loss, learning rates and the loop's metrics in its line. Where stderr
/// is no terminal it draws nothing.
#[derive(Clone, Debug)]
pub struct ProgressBar {
    bar: Option<Bar>,
    most: usize,
}

impl ProgressBar {
    /// Show at most 4 metrics beside the loss.
    pub fn new() -> Self {
        Self { bar: None, most: 4 }
    }

    /// Show at most so many metrics.
    pub fn metrics(mut self, most: usize) -> Self {
        self.most = most;
        self
    }

    fn line(&self, moment: &Moment<'_>) -> String {
        let mut parts = Vec::new();
        if let Some(loss) = moment.loss {
            parts.push(format!("loss={loss:.4}"));
        }
        let shown = moment
            .metrics
            .iter()
            .filter(|(name, _)| *name != "loss" || moment.loss.is_none());
        parts.extend(
            shown
                .take(self.most)
                .map(|(name, value)| format!("{name}={value:.4}")),
        );
        parts.extend(
            moment
                .learning_rates
                .iter()
                .map(|(name, rate)| format!("{name}={rate:.2e}")),
        );
        parts.join(" ")
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon(); // stays where it is
        }
    }
}

impl Default for ProgressBar {
    fn default() -> Self {
        Self::new()
    }
}

impl Callback for ProgressBar {
    fn on_train_epoch_start(&mut self, fabric: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        self.end();
        if !fabric.is_global_zero() {
            return Ok(());
        }
        let progress = moment.progress;
        let template = match progress.of_batches {
            Some(_) => WITH_END,
            None => WITHOUT_END,
        };
        let bar = Bar::with_draw_target(progress.of_batches, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template(template)?.with_key("rate", rate));
        bar.set_prefix(match progress.of_epochs {
            Some(all) => format!("epoch {}/{all}", progress.epoch + 1),
            None => format!("epoch {}", progress.epoch + 1),
        });
        bar.set_position(progress.batch);
        bar.reset_eta(); // of a run that goes on
        self.bar = Some(bar);
        Ok(())
    }

    fn on_train_batch_end(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.set_message(self.line(moment));
            bar.set_position(moment.progress.batch + 1);
        }
        Ok(())
    }

    fn on_validation_start(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.set_message("validating");
        }
        Ok(())
    }

    fn on_validation_end(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.set_message(self.line(moment));
        }
        Ok(())
    }

    fn on_train_epoch_end(&mut self, _: &Fabric, moment: &mut Moment<'_>) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.set_message(self.line(moment));
        }
        self.end();
        Ok(())
    }

    fn on_train_end(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        self.end();
        Ok(())
    }

    fn on_exception(&mut self, _: &Fabric, _: &mut Moment<'_>) -> Result<()> {
        self.end();
        Ok(())
    }

    fn twin(&self) -> Option<Box<dyn Callback>> {
        Some(Box::new(Self {
            bar: None,
            ..self.clone()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callback::{Hook, LoopState};

    #[test]
    fn the_line_has_the_loss_a_few_metrics_and_rates() {
        let mut state = LoopState::default();
        for (name, value) in [("loss", 9.0), ("val_loss", 0.25), ("a", 1.0), ("b", 2.0)] {
            state.metrics.set(name, value);
        }
        state.learning_rates.set("lr", 3e-4);
        let bar = ProgressBar::new().metrics(2);
        let line = bar.line(&state.moment().loss(0.123456));
        assert_eq!(line, "loss=0.1235 val_loss=0.2500 a=1.0000 lr=3.00e-4");
    }

    #[test]
    fn an_epoch_is_a_bar_that_follows_the_batches() {
        let fabric = Fabric::builder().devices(1).build().unwrap();
        let (mut state, mut bar) = (LoopState::default(), ProgressBar::new());
        state.progress.of_batches = Some(5);
        for template in [WITH_END, WITHOUT_END] {
            ProgressStyle::with_template(template).unwrap();
        }
        bar.notify(Hook::TrainEpochStart, &fabric, &mut state.moment())
            .unwrap();
        state.progress.batch = 2;
        bar.notify(Hook::TrainBatchEnd, &fabric, &mut state.moment().loss(0.5))
            .unwrap();
        let drawn = bar.bar.clone().unwrap();
        assert_eq!((drawn.position(), drawn.length()), (3, Some(5)));
        assert_eq!(
            (drawn.message().as_str(), drawn.prefix().as_str()),
            ("loss=0.5000", "epoch 1")
        );
        bar.notify(Hook::TrainEpochEnd, &fabric, &mut state.moment())
            .unwrap();
        assert!(bar.bar.is_none() && drawn.is_finished());
    }
}
