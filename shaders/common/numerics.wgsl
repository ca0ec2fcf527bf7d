// numerics.wgsl: functions where WGSL's own are not exact enough everywhere, and the softmax's sentinels.

// The running maximum before any key: the lowest finite f32. Infinity cannot be written in WGSL, and
// may be assumed absent.
const MASKED_SCORE: f32 = -3.4028234663852886e+38;

// A probability's place when its key is not allowed; compared by bits, so that NaN stays NaN.
const MASKED_PROB: f32 = -1.0;

fn is_masked(prob: f32) -> bool {
    return bitcast<u32>(prob) == 0xbf800000u;
}

fn is_negative_infinity(value: f32) -> bool {
    return bitcast<u32>(value) == 0xff800000u;
}

// A sum of powers to which nothing was added. By its bits: a comparison may call NaN what it likes.
fn is_empty_sum(sum: f32) -> bool {
    return bitcast<u32>(sum) == 0u;
}

// ln(x) for x > 0, to about 1 ulp: x = m * 2^e with m in [sqrt(1/2), sqrt(2)), then the rational-free
// form of Cephes' logf. WGSL allows its own log an absolute error of 2^-21 near 1.
fn natural_log(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    // infinity and NaN stay; sums of exponentials are never subnormal
    if bits >= 0x7f800000u {
        return x;
    }
    var exponent = i32(bits >> 23u) - 126;
    var m = bitcast<f32>((bits & 0x7fffffu) | 0x3f000000u);
    if m < 0.70710678 {
        exponent -= 1;
        m += m;
    }
    let f = m - 1.0;
    let z = f * f;
    var p = 7.0376836292e-2 * f - 1.1514610310e-1;
    p = p * f + 1.1676998740e-1;
    p = p * f - 1.2420140846e-1;
    p = p * f + 1.4249322787e-1;
    p = p * f - 1.6668057665e-1;
    p = p * f + 2.0000714765e-1;
    p = p * f - 2.4999993993e-1;
    p = p * f + 3.3333331174e-1;
    let e = f32(exponent);
    // ln(2) in two parts, so that e * 0.693359375 is exact
    let low = p * f * z - 2.12194440e-4 * e - 0.5 * z;
    return f + low + 0.693359375 * e;
}

// tanh(x) to a few ulp (Cephes' tanhf). WGSL's own may be computed as a quotient of exponentials, which
// loses all digits near 0 and overflows from 89 on.
fn hyperbolic_tangent(x: f32) -> f32 {
    let magnitude = abs(x);
    if magnitude < 0.625 {
        let z = x * x;
        var p = -5.70498872745e-3 * z + 2.06390887954e-2;
        p = p * z - 5.37397155531e-2;
        p = p * z + 1.33314422036e-1;
        p = p * z - 3.33332819422e-1;
        return p * z * x + x;
    }
    if magnitude > 10.0 {
        return sign(x);
    }
    // NaN ends here and stays NaN
    let t = 1.0 - 2.0 / (exp(2.0 * magnitude) + 1.0);
    return select(t, -t, x < 0.0);
}
