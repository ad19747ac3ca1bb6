//! How many floating-point operations a transformer's training step takes, counted on paper: no tensor library counts them.

/// A transformer's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transformer {
    /// Parameters that take part in matrix products: without the table of embeddings, unless the head is tied to it.
    pub params: u64,
    /// Layers of attention.
    pub layers: u64,
    /// Elements of an attention layer: heads times the size of a head.
    pub width: u64,
}

/// Floating-point operations of a forward and a backward over `tokens` tokens in sequences of `seq`, as in appendix B of the
/// PaLM paper (Chowdhery et al., 2022): `6 N + 12 L H Q T` for each token. Recomputed activations do not count: this is for the
/// model FLOPs utilisation. A forward alone is a third of it.
///
/// ```
/// use fabric::throughput::{Transformer, transformer_flops};
///
/// let gpt2 = Transformer { params: 124_000_000, layers: 12, width: 768 };
/// assert_eq!(transformer_flops(gpt2, 1024, 1024), 1024.0 * (6.0 * 124e6 + 12.0 * 12.0 * 768.0 * 1024.0));
/// ```
pub fn transformer_flops(model: Transformer, tokens: u64, seq: u64) -> f64 {
    let Transformer {
        params,
        layers,
        width,
    } = model;
    let dense = 6.0 * params as f64;
    let attention = 12.0 * layers as f64 * width as f64 * seq as f64;
    tokens as f64 * (dense + attention)
}

#[cfg(test)]
mod tests {
    use super::*;

    // UTIL-12
    #[test]
    fn palms_utilisation_comes_out() {
        // Appendix B, table 3: PaLM 540B, 238.3 thousand tokens a second on 6144 TPU v4 of 275 TFLOP/s, 46.2 %.
        let palm = Transformer {
            params: 540_350_000_000,
            layers: 118,
            width: 48 * 256,
        };
        let a_second = transformer_flops(palm, 238_300, 2048);
        let utilisation = a_second / (6144.0 * 275e12);
        assert!((utilisation - 0.462).abs() < 0.002, "{utilisation}");
    }
}
