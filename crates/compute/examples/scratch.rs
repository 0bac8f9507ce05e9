use compute::*;
use std::time::Instant;
fn time(name: &str, bytes: f64, mut f: impl FnMut()) {
    f();
    let mut best = f64::MAX;
    for _ in 0..15 {
        let s = Instant::now();
        f();
        best = best.min(s.elapsed().as_secs_f64());
    }
    println!("{name:24} {:8.3} ms {:8.2} GB/s", best * 1e3, bytes / best / 1e9);
}
fn main() {
    let c = Cpu::new(1, Precision::Fp32);
    let v = |n: usize| c.upload((0..n).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect());
    let r = 1024;
    let gu = v(r * 3072);
    let dy = v(r * 1536);
    time("swiglu", (r * 4608 * 4) as f64, || {
        c.recycle(c.download(c.swiglu(&gu, 1536)));
    });
    time("swiglu_backward", (r * (3072 * 2 + 1536) * 4) as f64, || {
        c.recycle(c.download(c.swiglu_backward(&dy, &gu, 1536)));
    });
    let mut x = v(r * 512);
    let x2 = v(r * 512);
    time("add", (r * 512 * 12) as f64, || c.add(&mut x, &x2));
    let sc = v(512);
    time("rms", (r * 512 * 8) as f64, || {
        let (y, i) = c.rms_norm(&x2, Window { flat: &sc, start: 0 }, 512, 1e-5);
        c.recycle(c.download(y));
        c.recycle(c.download(i));
    });
    let inv = v(r);
    let mut dx = v(r * 512);
    let mut ds = v(512);
    time("rms_backward", (r * 512 * 16) as f64, || {
        c.rms_norm_backward(
            &x,
            (&x2, &inv),
            Window { flat: &sc, start: 0 },
            512,
            &mut dx,
            WindowMut { flat: &mut ds, start: 0 },
        )
    });
    let t: Vec<u32> = (0..r as u32).collect();
    let mut lg = v(r * 4096);
    time("cross_entropy", (r * 4096 * 8) as f64, || {
        c.cross_entropy(&mut lg, &t, 4096, 1e-3);
    });
    let d = AttentionDims { sequences: 4, length: 256, heads: 8, kv_heads: 4, head_dim: 64 };
    let qkv = v(r * 1024);
    let mut o = None;
    time("attention", 0.0, || {
        o = Some(c.attention(&qkv, &d));
    });
    let (y, l) = o.unwrap();
    let dyy = v(r * 512);
    time("attention_backward", 0.0, || {
        c.recycle(c.download(c.attention_backward(&dyy, &qkv, (&y, &l), &d)));
    });
    for (k, n) in [(512, 1024), (512, 512), (512, 3072), (1536, 512), (512, 4096)] {
        let p = ProductDims { r, k, n };
        let xx = v(r * k);
        let w = v(n * k);
        let g = v(r * n);
        let mut dw = v(n * k);
        let fl = (2 * r * k * n) as f64;
        println!("k {k} n {n} (GB/s column = GFLOP/s)");
        time(" forward", fl, || {
            c.recycle(c.download(c.product(&xx, Window { flat: &w, start: 0 }, p)));
        });
        time(" input", fl, || {
            c.recycle(c.download(c.product_input_gradient(&g, Window { flat: &w, start: 0 }, p)));
        });
        time(" weight", fl, || {
            c.product_weight_gradient(&g, &xx, p, WindowMut { flat: &mut dw, start: 0 })
        });
    }
    let n = 4 << 20;
    let (mut p, mut m, mut q, g) = (v(n), v(n), v(n), v(n));
    let s = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 1.0,
        update: 3,
    };
    time("adamw", (n * 28) as f64, || c.adamw(&s, [&mut p, &mut m, &mut q], &g, 0..n));
    time("square_sum", (n * 4) as f64, || {
        c.square_sum(&g, 0..n);
    });
    let mut z = v(n);
    time("zero", (n * 4) as f64, || {
        z = c.zeros(n);
    });
}
