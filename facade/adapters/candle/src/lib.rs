//! Candle under Fabric.
