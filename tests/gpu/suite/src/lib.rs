//! What every suite over the stand-ins needs: [`stage`], on which a test runs, and [`fakes`], what the stand-ins tell.

pub mod fakes;
pub mod stage;
